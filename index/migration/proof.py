"""Proves on sampled texts that old vectors may be copied: what is known of them may be wrong."""

from index.migrate import Migration, MigrationRefused
from providers import vector

from .embed import Refused


async def prove(migration: Migration, least: float) -> None:
    """Embed sampled texts, past the cache, and compare them with the old vectors.

    Raises MigrationRefused if one differs: then nothing has been copied.
    """
    state, width = migration.state, migration.model.dimensions
    if not migration.regime.copies or state.proof is not None:
        return
    drawn = await migration.points.sample(state.source, 4 * migration.pace.sample)
    sound = [one for one in drawn if migration.oddity(one) is None]
    able = [(one, text) for one in sound if (text := migration.rule.text(one.payload)) is not None]
    able = able[: migration.pace.sample]
    if not able:
        if await migration.points.count(state.source):
            raise MigrationRefused(
                f"{state.source}: none of {len(drawn)} sampled points has a text at"
                f" {state.rule} and a sound vector: nothing proves that vectors may be copied"
            )
        return
    answers = await migration.patient.embed([text for _, text in able], anew=True)
    pairs = zip((one for one, _ in able), answers, strict=True)
    there = [(one, new) for one, new in pairs if not isinstance(new, Refused)]
    cosines = [
        vector.cosine(vector.derive([one.vector or b""], width)[0], new) for one, new in there
    ]
    if not there:
        raise MigrationRefused(f"{state.model} takes none of the sampled texts")
    off = sum(cosine < least for cosine in cosines)
    migration.save()
    if off:
        raise MigrationRefused(
            f"{off} of {len(there)} sampled texts of {state.source} have other vectors in"
            f" {state.model} (cosine {min(cosines):.3f}, wanted {least}): these vectors are not of"
            f" this model and this text ({state.rule}); --regime reembed buys them"
        )
    state.proof = min(cosines)
    state.proved = [one.id for one, _ in there]
    migration.save()
