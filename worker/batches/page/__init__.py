"""The web page of the Batches API: a list of batches, one batch, an upload form; made on the server, no scripts."""
