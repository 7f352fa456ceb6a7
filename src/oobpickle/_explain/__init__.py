"""Explain: what becomes of an object when it is sent, part by part, without sending it."""
