"""Worlds: families of tasks with the state and tools that they need. One config a world, one place that makes it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from envs.worlds.chains import Chains, ChainsConfig
from envs.worlds.code import Code, CodeConfig
from envs.worlds.desk import Desk, DeskConfig
from envs.worlds.facts import Facts, FactsConfig
from envs.worlds.requests import Requests, RequestsConfig
from envs.worlds.rules import Rules, RulesConfig
from envs.worlds.search import Search, SearchConfig
from envs.worlds.terminal import Terminal, TerminalConfig
from envs.worlds.verify import Verify, VerifyConfig
from envs.worlds.work import Work, WorkConfig
from posttrain.protocols import World

AnyWorldConfig = (
    ChainsConfig
    | CodeConfig
    | DeskConfig
    | FactsConfig
    | RequestsConfig
    | RulesConfig
    | SearchConfig
    | TerminalConfig
    | VerifyConfig
    | WorkConfig
)
WorldConfig = Annotated[AnyWorldConfig, Field(discriminator="type")]
"""What a config file may say of a world; ``type`` tells which."""


def make_world(config: AnyWorldConfig, name: str) -> World:
    """The world that ``config`` describes, called ``name`` in task ids and reports."""
    match config:
        case ChainsConfig():
            world = Chains(config, name)
        case CodeConfig():
            world = Code(config, name)
        case DeskConfig():
            world = Desk(config, name)
        case FactsConfig():
            world = Facts(config, name)
        case RequestsConfig():
            world = Requests(config, name)
        case RulesConfig():
            world = Rules(config, name)
        case SearchConfig():
            world = Search(config, name)
        case TerminalConfig():
            return Terminal(config, name)
        case VerifyConfig():
            world = Verify(config, name)
        case WorkConfig():
            world = Work(config, name)
    world.obey(config)
    return world


__all__ = [
    "ChainsConfig",
    "CodeConfig",
    "DeskConfig",
    "FactsConfig",
    "RequestsConfig",
    "RulesConfig",
    "SearchConfig",
    "TerminalConfig",
    "VerifyConfig",
    "WorkConfig",
    "WorldConfig",
    "make_world",
]
