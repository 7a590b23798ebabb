"""One file per `penstock bench` verb; each measures us and a peer in the same run and prints the ratio."""
