# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear chat MODEL`: transformers' chat in the terminal, with the server of `switchgear serve` behind it."""

from __future__ import annotations

import argparse
import logging
import time
from typing import Any

from .common import CommandError, require
from .serve import add_model, start


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add = parser.add_argument
    add("--system-prompt", metavar="TEXT", help="what the model is told first")
    add("--generate", metavar="NAME=VALUE", action="append", default=[],
        help="an option of generate: max_new_tokens=256")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    require("rich")
    chat = require("transformers.cli.chat")
    logging.disable(logging.WARNING)  # a line for each request
    try:
        return _run(args, chat)
    finally:
        logging.disable(logging.NOTSET)


def _run(args: argparse.Namespace, chat: Any) -> int:
    serving = start(args, port=0, log_level="error", non_blocking=True)
    try:
        while not serving.server.started:
            if not serving._thread.is_alive():
                raise CommandError("the server ended before it listened")
            time.sleep(0.01)
        port = serving.server.servers[0].sockets[0].getsockname()[1]
        chat.Chat(args.model, f"http://localhost:{port}", args.generate, system_prompt=args.system_prompt)
    finally:
        serving.kill_server()
    return 0
