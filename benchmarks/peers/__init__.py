"""Peers, written from their published descriptions, for policies that cannot run here as published."""
