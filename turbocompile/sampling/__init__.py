"""Samplers: rCM and the flow-matching ODE."""
