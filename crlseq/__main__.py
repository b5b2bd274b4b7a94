"""``python -m crlseq``."""

from crlseq.cli.app import main

if __name__ == "__main__":
    main()
