"""Ray: the only folder that may import it. Training on one machine needs nothing from here."""
