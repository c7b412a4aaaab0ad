"""The engine: how a flow is solved."""
