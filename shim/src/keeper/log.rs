//! What shared code says through `tracing` inside the keeper, on standard error as the keeper's own messages. Written out here, because the
//! usual subscriber costs more memory than all the rest of the keeper.

use std::fmt::{self, Write as _};

use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
    span,
};

/// Lets warnings and errors be seen. Once per process; another subscriber that is there already stays.
pub(super) fn to_stderr() {
    // Fails only if there is one.
    let _ = tracing::subscriber::set_global_default(Lines);
}

struct Lines;

impl Subscriber for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::WARN
    }

    // No span is kept: the keeper has none, and a line stands for itself.
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        eprintln!("kuasard: {}", Line::of(event));
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

/// `message (field: value, field: value)`.
#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Line {
    fn of(event: &Event<'_>) -> Self {
        let mut line = Self::default();
        event.record(&mut line);
        line
    }
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a string does not fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, "{}{name}: {value:?}", if self.fields.is_empty() { "" } else { ", " }),
        };
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.fields.as_str() {
            "" => f.write_str(&self.message),
            fields => write!(f, "{} ({fields})", self.message),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Takes lines instead of printing them.
    struct Taken(&'static Mutex<Vec<String>>);

    impl Subscriber for Taken {
        fn enabled(&self, metadata: &Metadata<'_>) -> bool {
            Lines.enabled(metadata)
        }
        fn new_span(&self, attributes: &span::Attributes<'_>) -> span::Id {
            Lines.new_span(attributes)
        }
        fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
        fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
        fn event(&self, event: &Event<'_>) {
            self.0.lock().unwrap().push(Line::of(event).to_string());
        }
        fn enter(&self, _: &span::Id) {}
        fn exit(&self, _: &span::Id) {}
    }

    #[test]
    fn a_line_has_all_that_was_said() {
        static TAKEN: Mutex<Vec<String>> = Mutex::new(Vec::new());
        tracing::subscriber::with_default(Taken(&TAKEN), || {
            tracing::warn!(pid = 7, error = %"no such child", "cannot reap a child");
            tracing::error!("nothing else");
            tracing::info!("of no interest");
        });
        assert_eq!(*TAKEN.lock().unwrap(), ["cannot reap a child (pid: 7, error: no such child)", "nothing else"]);
    }
}
