//! Records as text and JSON.

use crate::store::Entry;

/// One line for each record.
pub fn lines_of(entries: &[Entry], json: bool) -> String {
    if json {
        let records: Vec<_> = entries.iter().map(|e| &e.record).collect();
        return format!("{}\n", serde_json::to_string_pretty(&records).unwrap_or_default());
    }
    let mut out = String::new();
    for e in entries {
        let r = &e.record;
        let git = r.git.as_ref().map_or_else(String::new, |g| {
            format!("  {}{}", &g.commit[..g.commit.len().min(12)], if g.dirty { " and changes" } else { "" })
        });
        let profile = r.cargo.as_ref().map_or_else(String::new, |c| format!("  {}", c.profile));
        out += &format!("{}  {}  {}{profile}{git}\n", r.build_id, utc(r.recorded_ms / 1000), r.name);
    }
    out
}

/// All of one record.
pub fn text_of(e: &Entry, json: bool) -> String {
    let r = &e.record;
    if json {
        return format!("{}\n", serde_json::to_string_pretty(r).unwrap_or_default());
    }
    let mut out = format!("build-id  {}\nrecorded  {}\n", r.build_id, utc(r.recorded_ms / 1000));
    out += &format!("image     {} ({} bytes)\n", e.image().display(), r.image.len_bytes);
    if let (Some(path), Some(ship)) = (e.ship(), &r.ship) {
        out += &format!("ship      {} ({} bytes)\n", path.display(), ship.len_bytes);
    }
    out += &format!("map       {}\n", e.map().map_or_else(|| "none".into(), |m| m.display().to_string()));
    if let Some(c) = &r.cargo {
        out += &format!("package   {}, {} {}, profile {}\n", c.package, c.kind, c.target, c.profile);
        if !c.args.is_empty() {
            out += &format!("asked     {}\n", c.args.join(" "));
        }
        out += &format!("flags     {}\n", c.flags.join(" "));
        out += &format!("shows     {}\n", c.paths.source.display());
    }
    if let Some(g) = &r.git {
        out +=
            &format!("git       {}{}\n", g.commit, if g.dirty { ", with changes that are not committed" } else { "" });
    }
    out += &format!("compiler  {}\n", r.compiler.lines().next().unwrap_or("unknown"));
    out += &format!(
        "linked as {}\nin        {}\nby        {}\n",
        r.output.display(),
        r.cwd.display(),
        r.command.join(" ")
    );
    if !r.inputs.is_empty() {
        out += &format!("of        {}\n", r.inputs.join(" "));
    }
    out
}

/// A time in seconds since 1970 as date and time (days to a date: Howard Hinnant, chrono-Compatible Low-Level Date Algorithms).
fn utc(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, doe) = (days / 146_097, days % 146_097);
    let yoe = (doe - doe / 1_460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let (day, month) = (doy - (153 * mp + 2) / 5 + 1, if mp < 10 { mp + 3 } else { mp - 9 });
    let year = yoe + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests {
    #[test]
    fn times_are_dates() {
        assert_eq!(super::utc(0), "1970-01-01 00:00:00Z");
        assert_eq!(super::utc(951_782_400), "2000-02-29 00:00:00Z");
        assert_eq!(super::utc(1_798_761_599), "2026-12-31 23:59:59Z");
    }
}
