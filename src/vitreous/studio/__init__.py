"""The studio: a web page on this machine in which attention is looked at, model by model."""
