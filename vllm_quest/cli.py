"""The command `vllm-quest`."""

import argparse
import sys

from vllm_quest import __version__
from vllm_quest.config import SCORES
from vllm_quest.explain import command as explain_command

EPILOG = """\
QUEST itself is switched on in vLLM, not here:

  vllm serve MODEL --attention-backend QUEST \\
      --additional-config '{"quest": {"token_budget": 1024}}'
"""


def main() -> None:
    """Run the command line; exits with 0 if all is well."""
    parser = argparse.ArgumentParser(
        prog="vllm-quest",
        description="QUEST attention for vLLM: see what works here, and try it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vllm-quest {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    commands.add_parser(
        "check",
        help="say what was found on this machine, what works, and what to do about the rest",
        description="One screen: vLLM, torch, the processor or GPU, the compiled operators.",
    )

    demo = commands.add_parser(
        "demo",
        help="serve the bundled model, ask it for pass keys hidden in a long text, compare budgets",
        description=(
            "Hides pass keys in a long text and asks for them through the OpenAI API: once with "
            "full attention, then under each budget. For each score of pages it starts a vLLM "
            "server with --attention-backend QUEST on the bundled model."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument(
        "--context", type=int, default=16384, metavar="TOKENS", help="length of the text"
    )
    demo.add_argument("--questions", type=int, default=8, help="pass keys to ask for")
    demo.add_argument(
        "--budgets",
        type=int,
        nargs="+",
        default=[2048, 512, 256],
        metavar="TOKENS",
        help="token budgets to compare with full attention",
    )
    demo.add_argument(
        "--scores",
        nargs="+",
        choices=SCORES,
        default=["minmax", "codes"],
        metavar="SCORE",
        help="what pages are scored by, to compare; the setting `score`",
    )
    demo.add_argument(
        "--kv-cache-dtype",
        default="auto",
        metavar="DTYPE",
        help="as of vllm serve; fp8, on GPUs, needs --scores minmax",
    )
    demo.add_argument("--seed", type=int, default=0, help="seed of the text and its pass keys")

    explain_command.add_options(
        commands.add_parser(
            "explain",
            help="run one request and draw which pages its decode steps read",
            description=(
                "Runs one request through vLLM with QUEST, draws which pages each layer and KV "
                "head read over the decode steps, and prints the share of the true attention "
                "that those pages held."
            ),
        )
    )

    arguments = parser.parse_args()
    if arguments.command == "check":
        from vllm_quest.check import run_check

        sys.exit(run_check())
    if arguments.command == "explain":
        sys.exit(explain_command.run_explain(arguments))
    from vllm_quest.demo import run_demo

    sys.exit(
        run_demo(
            context_tokens=arguments.context,
            num_questions=arguments.questions,
            budgets=arguments.budgets,
            scores=arguments.scores,
            kv_cache_dtype=arguments.kv_cache_dtype,
            seed=arguments.seed,
        )
    )
