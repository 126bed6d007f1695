"""Random input for everything that listens: routes, our WebSocket, and what the provider may send us."""
