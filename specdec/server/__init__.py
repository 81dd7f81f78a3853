"""The server: OpenAI's and Anthropic's endpoints over one engine, for agents and editors on this machine."""
