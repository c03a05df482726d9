from recallzoo.run import Run


def first() -> list[Run]:
    return []


def second() -> list[Run]:
    return []
