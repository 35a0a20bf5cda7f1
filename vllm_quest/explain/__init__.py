"""`vllm-quest explain`: which pages a request's decode steps read, and what they were worth.

`recording` watches the layers, `request` runs one request through vLLM, `drawing` makes the
picture, `command` is the command line.
"""
