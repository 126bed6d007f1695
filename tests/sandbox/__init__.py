"""The stand-in of DashScope and OSS, spoken to over real sockets."""
