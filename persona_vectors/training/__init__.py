"""Inside and after a training run: probes, penalties, fine-tuning, shifts, labelled sets."""
