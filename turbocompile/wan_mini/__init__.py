"""Moving handwritten digits: a world small enough that a video can be judged against its prompt.

`world` says what exists (prompts, colours, motions, the held-out combinations) and draws it; `judge` looks at a video
and says which digit, colour and motion it shows.
"""
