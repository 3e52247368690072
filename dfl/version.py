"""The version of the project, by itself: what compares or saves it need not import the package."""

__version__ = "0.1.0"
