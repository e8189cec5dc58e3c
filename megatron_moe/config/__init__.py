"""Typed configuration: frozen dataclasses, one per concern, from which the command line is generated."""
