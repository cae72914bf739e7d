"""Searches in vector stores."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from serving.http.schemas.common import MAX_ITEMS, Answer, ModelName, Sequences, Usage, Wire

MOST = 1000  # neighbours of one query
Vector = Annotated[list[float], Field(min_length=1, max_length=1 << 16)]


class SearchRequest(Wire):
    """The nearest vectors of a store to sequences, which are embedded as the store's were, or to vectors of its width."""

    store: Annotated[
        str,
        Field(
            min_length=1, max_length=120, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
            description="A vector store of this server.", examples=["proteins"],
        ),
    ]  # fmt: skip
    sequences: Sequences | None = None
    vectors: Annotated[list[Vector], Field(min_length=1, max_length=MAX_ITEMS)] | None = Field(
        None, description="In place of sequences."
    )
    model: ModelName = Field("default", description="The backbone that made the store.")
    k: int = Field(10, ge=1, le=MOST, description="Neighbours of each query.")
    exact: bool | None = Field(
        None,
        description="true compares with every vector, false uses the index; default: by the store's size.",
    )


class StoreInfo(Answer):
    store: str
    vectors: int
    indexed: bool = Field(description="Whether it has an index for approximate searches.")
    weights_hash: str = Field(description="Of the backbone that made its vectors.")


class StoreList(Answer):
    data: list[StoreInfo]


class Hit(Answer):
    ids: list[str] = Field(description="The ids that came with this vector.")
    similarity: float = Field(description="Cosine.")


class SearchItem(Answer):
    index: int
    hits: list[Hit] = Field(description="Best first; fewer than k where the store is smaller.")
    notes: list[str] = Field(description="What was done to the sequence on the way.")


class SearchResponse(Answer):
    model: str = Field(description="The exact version that embedded the sequences.")
    store: str
    vectors: int = Field(description="In the store.")
    exact: bool
    data: list[SearchItem]
    usage: Usage
