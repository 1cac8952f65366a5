"""Files and batches as in OpenAI's API, in front of the topics: each line of a file is one message to the worker."""
