"""How a graph is cut."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Method = Literal["metis", "ldg", "fennel", "random"]


class PartitionConfig(BaseModel):
    """`parts` times `chunks` pieces, none with more than 1 + `slack` times the mean nodes.

    LDG and Fennel stream the graph `passes` times; ten come near METIS on graphs with communities, three do not.
    `auto` is METIS where its memory fits and DGL is installed, else LDG. METIS ignores `seed`: DGL hands it none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    chunks: Annotated[int, Field(ge=1)] = 32
    parts: Annotated[int, Field(ge=1)] = 1
    method: Literal["auto", "metis", "ldg", "fennel", "random"] = "auto"
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    passes: Annotated[int, Field(ge=1)] = 10
    slack: Annotated[float, Field(ge=0)] = 0.1
