"""`python -m vllm_quest` is the command `vllm-quest`, also where no script was installed."""

from vllm_quest.cli import main

if __name__ == "__main__":
    main()
