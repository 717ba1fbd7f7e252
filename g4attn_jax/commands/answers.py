"""Answers of several prompts on standard output, each as it is made."""

from collections.abc import Sequence


class Answers:
    """Prints answers in turn.

    The answer to the first prompt is printed as it is made. Those after it wait, whole or in part,
    until the one before has ended: sequences are made together, and read one after the other.
    """

    def __init__(self, job):
        """Takes the job whose prompts are answered."""
        self._job = job
        self._tokens = [[] for _ in job.prompts]
        self._texts = [Text(job.tokenizer) for _ in job.prompts if job.tokenizer is not None]
        self._waiting = [""] * len(self._texts)
        self._at, self._is_begun = 0, False

    def add(self, new: Sequence[Sequence[int]]) -> None:
        """Takes the next tokens of each sequence, and prints what is due."""
        for tokens, more in zip(self._tokens, new, strict=True):
            tokens += more
        for index, text in enumerate(self._texts):
            self._waiting[index] += text.after(new[index])
        while self._at < len(self._tokens) and self._print():
            self._at, self._is_begun = self._at + 1, False

    def _print(self):
        """Prints what there is of the answer at hand; whether that is all of it."""
        tokens = self._tokens[self._at]
        if not self._is_begun and len(self._tokens) > 1:
            print(f"prompt {self._at}:")
        self._is_begun = True
        if self._texts:
            print(self._waiting[self._at], end="", flush=True)
            self._waiting[self._at] = ""
        has_ended = len(tokens) == self._job.max_new_tokens or (
            bool(tokens) and tokens[-1] in self._job.stop_tokens
        )
        if has_ended:
            if self._texts:
                print()
            print("tokens:", ",".join(map(str, tokens)), flush=True)
        return has_ended


class Text:
    """Tokens to text, a few at a time: what is no whole character yet is kept back."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._begin()

    def after(self, tokens: Sequence[int]) -> str:
        """The whole characters that these tokens complete."""
        return "".join(self._step(token) or "" for token in tokens)

    def _begin(self):
        from tokenizers.decoders import DecodeStream

        self._stream = DecodeStream(skip_special_tokens=True)

    def _step(self, token):
        try:
            return self._stream.step(self._tokenizer, token)
        except Exception as error:  # the package raises no class of its own
            if not str(error).startswith("Invalid prefix encountered"):
                raise
            # It does after bytes that are no character, which are then left out (vLLM #19449).
            self._begin()
            return self._stream.step(self._tokenizer, token)
