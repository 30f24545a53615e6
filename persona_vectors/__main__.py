"""`python -m persona_vectors` is the command `persona-vectors`."""

from persona_vectors.cli.main import main

if __name__ == "__main__":
    main()
