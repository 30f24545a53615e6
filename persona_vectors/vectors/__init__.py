"""Persona vectors: the value, its directions, geometry and controls, and other tools' formats."""
