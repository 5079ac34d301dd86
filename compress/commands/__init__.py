"""What the sub-commands do that run no method; cli.py builds each when it is called. Only these files and cli.py import
typer."""
