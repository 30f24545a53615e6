"""A server that speaks OpenAI's protocol, and its page."""
