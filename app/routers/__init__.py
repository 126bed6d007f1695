"""HTTP endpoints: parse, call one service, answer."""
