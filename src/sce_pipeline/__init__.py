"""Train next-item recommenders over large catalogues and compare their losses."""

__version__ = "0.1.0"
