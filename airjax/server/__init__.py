"""The server: OpenAI's routes over shared sweeps."""
