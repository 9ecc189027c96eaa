"""Moving handwritten digits: a world so small that a program can judge a video against its prompt.

`world` defines the prompts, colours, motions and held-out combinations, and draws their videos; `judge` names the
digit, colour and motion that a video shows.
"""
