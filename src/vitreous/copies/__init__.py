"""Copies of a model to work on or to run, none of which anybody else holds."""
