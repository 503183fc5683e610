"""``python -m hyperfaiss`` is the ``hyperfaiss`` command."""

from .cli import app

if __name__ == "__main__":
    app(prog_name="hyperfaiss")
