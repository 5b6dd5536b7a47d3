//! What a long command shows while it works.

use std::cell::Cell;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// For so long, a command works without a bar.
const PATIENCE: Duration = Duration::from_millis(300);

/// A progress bar on standard error. It shows itself when something takes longer than [`PATIENCE`].
pub struct Bar {
    bar: ProgressBar,
    started: Instant,
    shown: Cell<bool>,
}

impl Bar {
    /// A bar that is not shown yet.
    pub fn new() -> Bar {
        let bar = ProgressBar::hidden();
        bar.set_length(1000);
        let template = "{spinner} {msg:<60} [{bar:24}] {elapsed}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(120));
        Bar { bar, started: Instant::now(), shown: Cell::new(false) }
    }

    /// Says what is being done, and the part of it that is done, 0 to 1, where that is known.
    pub fn say(&self, what: &str, part: Option<f64>) {
        self.bar.set_message(what.to_owned());
        self.bar.set_position(part.map_or(0, |part| (part * 1000.0) as u64));
        if !self.shown.get() && self.started.elapsed() > PATIENCE {
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
            self.shown.set(true);
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
