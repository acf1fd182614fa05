"""How the tests here report: a line for each case, a count at the end."""

import sys
import time
import traceback


class Skip(Exception):
    """Raised by a case that cannot run on this machine."""


class Results:
    """Counts cases.  With no_skip a case that would be skipped fails."""

    def __init__(self, no_skip=False):
        self.no_skip = no_skip
        self.passed = self.failed = self.skipped = 0

    def run(self, name, case, *args):
        """Run one case; it passes if it returns.  Returns whether it did.

        If it returns a text, that is printed behind its name.
        """
        start = time.monotonic()
        try:
            note = case(*args)
        except Skip as e:
            self.skip(name, e)
            return False
        except KeyboardInterrupt:
            raise
        except AssertionError as e:
            self.fail(name, str(e) or where(e))
            return False
        except Exception as e:
            self.fail(name, '%s: %s (%s)' % (type(e).__name__, e, where(e)))
            return False
        self.passed += 1
        note = note + ' ' if isinstance(note, str) else ''
        self.line('ok', name, '%s(%.1f s)'
                  % (note, time.monotonic() - start))
        return True

    def fail(self, name, reason):
        self.failed += 1
        self.line('FAILED', name, reason)

    def skip(self, name, reason):
        if self.no_skip:
            self.fail(name, 'would be skipped: %s' % reason)
        else:
            self.skipped += 1
            self.line('skipped', name, reason)

    @staticmethod
    def line(word, name, text):
        print('%-8s %s: %s' % (word, name, text), flush=True)

    def close(self):
        """Print the closing line; the exit status for the whole."""
        print('%d passed, %d failed, %d skipped'
              % (self.passed, self.failed, self.skipped), flush=True)
        return 1 if self.failed or not self.passed else 0


def where(e):
    frame = traceback.extract_tb(e.__traceback__)[-1]
    return '%s, line %d: %s' % (frame.name, frame.lineno, frame.line)


def difference(got, want, around=30):
    """Where two byte strings begin to differ, for a person to read."""
    at = next((i for i, (a, b) in enumerate(zip(got, want)) if a != b),
              min(len(got), len(want)))
    low = max(0, at - around)
    return ('%d bytes instead of %d, they differ at %d: got %r, want %r'
            % (len(got), len(want), at, got[low:at + around],
               want[low:at + around]))


def same(got, want, what='data'):
    """Assert that two byte strings are equal."""
    assert got == want, '%s: %s' % (what, difference(got, want))


def terminate_on_signal():
    """Let SIGTERM end the program in order, so that servers are stopped."""
    import signal
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
