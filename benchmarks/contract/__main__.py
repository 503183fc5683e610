import typer

from .matrix import main

typer.run(main)
