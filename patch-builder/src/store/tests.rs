use super::*;

struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("patch-builder-store-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).expect("a folder");
        Self(dir)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn image(dir: &Path, name: &str, value: u32) -> PathBuf {
    let (source, out) = (dir.join("m.c"), dir.join(name));
    fs::write(&source, format!("int main(void) {{ return {value}; }}\n")).expect("written");
    let ok = std::process::Command::new("gcc")
        .args(["-g", "-Wl,--build-id", "-Wl,--emit-relocs", "-o"])
        .args([&out, &source])
        .status()
        .is_ok_and(|s| s.success());
    assert!(ok, "gcc");
    out
}

fn put(store: &Store, image: &Path) -> (Entry, bool) {
    store.put(Record::default(), &Parts { ship: true, ..Parts::of(image) }).expect("recorded")
}

#[test]
fn a_record_is_found_by_its_beginning_and_written_once() {
    let scratch = Scratch::new("once");
    let store = Store::at(scratch.0.join("store"));
    let (one, two) = (image(&scratch.0, "one", 1), image(&scratch.0, "two", 2));
    let (first, new) = put(&store, &one);
    assert!(new);
    assert!(!put(&store, &one).1, "the same image is recorded once");
    assert!(put(&store, &two).1);
    let id = &first.record.build_id;
    let found = store.find(&id[..12]).expect("found");
    assert_eq!(found.record.build_id, *id);
    assert_eq!(fs::read(found.image()).expect("image"), fs::read(&one).expect("image"));
    let ship = found.ship().expect("a stripped copy");
    assert_eq!(build_id(&ship).expect("ELF").as_ref(), Some(id));
    assert!(fs::metadata(&ship).expect("ship").len() < fs::metadata(&one).expect("one").len());
    assert!(matches!(store.find("00"), Err(StoreError::NotFound { .. })), "two digits name nothing");
    assert!(matches!(store.find("../../etc"), Err(StoreError::NotFound { .. })));
    assert_eq!(store.list().expect("a list").0.len(), 2);
    store.remove(&found).expect("removed");
    assert!(matches!(store.find(id), Err(StoreError::NotFound { .. })));
    let left: Vec<_> = fs::read_dir(store.root()).expect("store").collect();
    assert_eq!(left.len(), 1, "nothing else is left behind");
}

#[test]
fn damage_is_seen_and_mended_by_recording_again() {
    let scratch = Scratch::new("damage");
    let store = Store::at(scratch.0.join("store"));
    let one = image(&scratch.0, "one", 1);
    let id = put(&store, &one).0.record.build_id;
    for file in ["one", "ship/one", "record.json"] {
        let path = store.root().join(&id).join(file);
        let mut bytes = fs::read(&path).expect("there");
        let last = bytes.len() - 2;
        bytes[last] ^= 1;
        fs::write(&path, bytes).expect("written");
        let error = store.find(&id).expect_err("damaged").to_string();
        assert!(error.contains("damaged") && error.contains(file), "{error}");
        assert!(put(&store, &one).1, "a damaged record is replaced");
        store.find(&id).expect("whole again");
    }
    // A record that points elsewhere is no record.
    let path = store.root().join(&id).join("record.json");
    let text = fs::read_to_string(&path).expect("text").replace("\"ship/one\"", "\"../../one\"");
    fs::write(&path, text).expect("written");
    assert!(matches!(store.find(&id), Err(StoreError::Damaged { .. })));
    let (good, bad) = store.list().expect("a list");
    assert_eq!((good.len(), bad.len()), (0, 1));
}

#[test]
fn what_has_no_build_id_is_not_recorded() {
    let scratch = Scratch::new("none");
    let store = Store::at(scratch.0.join("store"));
    let path = scratch.0.join("text");
    fs::write(&path, "no image").expect("written");
    let error = store.put(Record::default(), &Parts::of(&path));
    assert!(matches!(error, Err(StoreError::Image { .. })));
}
