//! A small gateway: one JSON object a line over TCP, one event loop, one audit thread.

mod audit;
mod net;
mod protocol;

struct Stderr;

impl log::Log for Stderr {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::Level::Info
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            eprintln!("{} {}:{} {}", record.level(), record.target(), record.line().unwrap_or(0), record.args());
        }
    }

    fn flush(&self) {}
}

fn main() {
    static LOGGER: Stderr = Stderr;
    let _ = log::set_logger(&LOGGER).map(|()| log::set_max_level(log::LevelFilter::Info));
    let port: u16 = std::env::args().nth(1).and_then(|p| p.parse().ok()).unwrap_or(0);
    let audit = audit::start();
    if let Err(e) = net::serve(port, &audit) {
        log::error!("{e}");
        std::process::exit(1);
    }
}
