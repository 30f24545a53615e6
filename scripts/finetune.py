"""Fine-tune as the paper does: python scripts/finetune.py CONFIG.json [--resume]   (the command of the same name)."""

import sys

from persona_vectors.cli.main import main

if __name__ == "__main__":
    sys.argv.insert(1, "finetune")
    main()
