"""How `embedding-proxy migrate` says what it found and did: for people, and for scripts."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import typer
from embedding_proxy.index.migration.journal import MigrationState, Phase, State
from embedding_proxy.index.migration.plan import Plan
from embedding_proxy.index.migration.verify import Verdict
from embedding_proxy.proxy.formatting import age, count, money

from .common import path_text

_NEXT = {
    Phase.COPYING: "run it again to go on",
    Phase.COPIED: "next: cutover",
    Phase.SWITCHING: "interrupted: cutover goes on, rollback goes back",
    Phase.SWITCHED: "next: finalize deletes the old collection, rollback goes back",
    Phase.ROLLED_BACK: "run goes on, run --restart begins anew",
    Phase.FINALIZED: "done",
}


def plan_dict(plan: Plan) -> dict[str, Any]:
    """Return a plan as JSON."""
    told = asdict(plan)
    told["regime"], told["why"] = plan.decision.regime, plan.decision.why
    del told["decision"]
    return told


def print_plans(found: Sequence[Plan], *, exact: bool) -> None:
    """Print what a migration would do; `exact` says whether the tokens are counted exactly."""
    for one in found:
        typer.echo(f"{one.collection}: {one.decision.regime} ({one.decision.why})")
        if one.source != one.collection:
            typer.echo(f"  {one.collection} is an alias of {one.source}")
        typer.echo(f"  {one.source} ({one.width}) -> {one.target} ({one.dimensions})")
        ids = f"{count(one.numeric_ids, 'number')}, {count(one.uuid_ids, 'UUID')}"
        typer.echo(
            f"  {count(one.points, 'point')} (ids: {ids}), {one.without_text:,} without text"
        )
        for why, number in sorted(one.odd_vectors.items()):
            typer.echo(f"  {count(number, 'odd vector')}: {why}")
        if one.dead:
            first = ", ".join(map(str, one.first_dead))
            typer.echo(f"  {count(one.dead, 'point')} cannot be carried: {first}")
        about = "" if exact else "about "
        typer.echo(
            f"  {one.to_embed:,} to embed: {count(one.distinct, 'distinct text')},"
            f" {about}{count(one.tokens, 'token')};"
            f" {count(one.cached, 'is', 'are')} in the cache"
        )
        typer.echo(
            f"  to buy: {count(one.to_buy, 'text')}, {about}{count(one.tokens_to_buy, 'token')},"
            f" {money(one.dollars)}"
        )
        typer.echo(
            f"  about {age(one.seconds)}, an estimate: {age(one.seconds_buying)} to buy (calls:"
            f" {one.calls:,}), {age(one.seconds_moving)} for Qdrant by what reading took now"
        )
    if len(found) > 1:
        typer.echo(
            f"in all: {count(sum(one.points for one in found), 'point')},"
            f" {count(sum(one.to_buy for one in found), 'text')} to buy,"
            f" {money(sum(one.dollars for one in found))},"
            f" about {age(sum(one.seconds for one in found))}"
        )


def state_dict(state: State, journal: MigrationState) -> dict[str, Any]:
    """Return the state of a migration as JSON."""
    told = asdict(state)
    told["phase"] = str(state.phase)
    told["dead_letters"] = path_text(journal.dead_letters) if state.counts.dead else None
    return told


def print_state(
    state: State, journal: MigrationState, sizes: Mapping[str, int] | None = None
) -> None:
    """Print how far a migration is; `sizes` are the points that are there now."""
    counts = state.counts
    typer.echo(f"{state.collection}: {state.phase}; {_NEXT[state.phase]}")
    typer.echo(f"  {state.source} -> {state.target}: {state.model}, {state.dimensions} numbers")
    typer.echo(f"  {state.regime}: {state.why}")
    if state.proof is not None:
        typer.echo(f"  proved on {len(state.proved)} texts: cosine {state.proof:.5f} at least")
    typer.echo(
        f"  {count(counts.points, 'point')} seen: {counts.copied:,} copied,"
        f" {counts.embedded:,} embedded, {counts.bought:,} bought;"
        f" {counts.updated:,} updated and {counts.deleted:,} deleted since"
    )
    for name, number in (sizes or {}).items():
        typer.echo(f"  {count(number, 'point')} in {name}")
    if state.aliases:
        typer.echo(f"  aliases: {', '.join(state.aliases)}")
    if counts.dead:
        letters = path_text(journal.dead_letters)
        typer.echo(f"  {counts.dead:,} could not be carried: {letters}")


def print_verdict(found: Verdict) -> None:
    """Print what a verification saw."""
    late = found.late
    if late is not None and (late.written or late.deleted or late.left or late.dead):
        typer.echo(
            f"  written to the old collection during the switch: {late.written:,} carried,"
            f" {late.deleted:,} deleted, {late.left:,} newer in the new one, {late.dead:,} could"
            " not be carried"
        )
    if late is not None and not late.quiet:
        typer.echo(
            "  the old collection is still written to, by its own name: let those clients use the"
            " alias; what they write from now on is not in the new one"
        )
    if not found.verified:
        return
    cosine = "" if found.cosine is None else f", cosine {found.cosine:.5f} at least"
    typer.echo(
        f"  verified: {found.new_points:,} of {count(found.old_points, 'point')},"
        f" ids and payloads equal; {found.sampled} sampled{cosine};"
        f" {found.recalled} found by their own vectors"
    )
