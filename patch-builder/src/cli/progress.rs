//! A bar on a terminal, once a run takes longer than a second.

use std::sync::mpsc::{channel, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::cost::PHASES;

/// Shows which phase is under way; taken away when dropped.
pub struct Progress {
    bar: ProgressBar,
    /// Dropped to end the waiting.
    over: Option<Sender<()>>,
    waiting: Option<JoinHandle<()>>,
}

impl Progress {
    /// Shows nothing yet, and nothing ever if standard error is no terminal (indicatif sees to that).
    pub fn new() -> Self {
        let bar = ProgressBar::with_draw_target(Some(PHASES.len() as u64), ProgressDrawTarget::hidden());
        if let Ok(style) = ProgressStyle::with_template("{spinner} {bar:30} {pos}/{len} {msg} {elapsed}") {
            bar.set_style(style);
        }
        let (over, wait) = channel();
        let shown = bar.clone();
        let waiting = std::thread::spawn(move || {
            if wait.recv_timeout(Duration::from_secs(1)) == Err(RecvTimeoutError::Timeout) {
                shown.set_draw_target(ProgressDrawTarget::stderr());
                shown.enable_steady_tick(Duration::from_millis(100));
            }
        });
        Self { bar, over: Some(over), waiting: Some(waiting) }
    }

    /// A phase begins.
    pub fn begins(&self, phase: &'static str) {
        self.bar.set_position(PHASES.iter().position(|p| *p == phase).unwrap_or(0) as u64);
        self.bar.set_message(phase);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        drop(self.over.take());
        if let Some(waiting) = self.waiting.take() {
            let _ = waiting.join();
        }
        self.bar.finish_and_clear();
    }
}
