"""The Kedro side: thin nodes and their wiring, one package for each stage."""
