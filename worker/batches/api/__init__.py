"""OpenAI's Files and Batches API over HTTP."""
