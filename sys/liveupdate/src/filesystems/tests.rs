use std::fs::File;
use std::sync::Condvar;
use std::sync::Mutex;

use super::mounts::Mount;
use super::*;

/// For what does not come.
const SOON: Duration = Duration::from_secs(2);
/// For what comes, on however busy a machine.
const LATE: Duration = Duration::from_secs(300);

/// A host that says how it was asked, and answers as the name of a mount point says.
#[derive(Default)]
struct Said {
    asked: Mutex<Vec<String>>,
    thawed: Condvar,
}

impl Said {
    fn note(&self, what: &str, point: &std::path::Path) {
        self.asked.lock().unwrap().push(format!("{what} {}", point.display()));
        self.thawed.notify_all();
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }

    fn wait_for(&self, what: &str) {
        let asked = self.asked.lock().unwrap();
        drop(self.thawed.wait_while(asked, |asked| !asked.iter().any(|said| said == what)).unwrap());
    }
}

impl Host for Said {
    fn freeze(&self, superblock: &Superblock) -> Answer {
        let point = superblock.filesystem().point;
        let error = |errno| Err(Refusal::Other(io::Error::from_raw_os_error(errno)));
        let answer = match point.to_str().unwrap() {
            "fat" => Err(Refusal::Unsupported),
            "theirs" => Err(Refusal::Frozen),
            "broken" => error(libc::EIO),
            "denied" => error(libc::EPERM),
            "on_root" => {
                self.wait_for("thaw root");
                Ok(())
            }
            _ => Ok(()),
        };
        self.note("freeze", &point);
        answer.map(|()| File::open("/dev/null").unwrap().into())
    }

    fn thaw(&self, filesystem: &Filesystem, _: &OwnedFd) -> io::Result<()> {
        self.note("thaw", &filesystem.point);
        match filesystem.point.to_str().unwrap() {
            "stubborn" => Err(io::Error::from_raw_os_error(libc::EIO)),
            _ => Ok(()),
        }
    }
}

fn superblocks(points: &[&str]) -> Vec<Superblock> {
    let superblock = |point: &&str| Superblock {
        device: (8, 1),
        kind: "ext4".to_owned(),
        read_only: *point == "read_only",
        mounts: vec![Mount { id: 1, point: point.into() }],
    };
    points.iter().map(superblock).collect()
}

fn hold(host: &Arc<Said>, points: &[&str], patience: Duration) -> Result<Still, HoldError> {
    Still::hold_by(Arc::<Said>::clone(host), superblocks(points), patience)
}

fn names<'a>(filesystems: impl Iterator<Item = &'a Filesystem>) -> Vec<&'a str> {
    filesystems.map(|filesystem| filesystem.point.to_str().unwrap()).collect()
}

#[test]
fn what_was_frozen_last_is_thawed_first_by_a_release_and_by_a_drop() {
    let thawed = ["freeze data", "freeze root", "thaw root", "thaw data"];
    let host = Arc::default();
    let still = hold(&host, &["data", "root"], LATE).unwrap();
    assert_eq!(names(still.held()), ["data", "root"]);
    assert_eq!(host.asked(), thawed[..2]);
    still.release().unwrap();
    assert_eq!(host.asked(), thawed);

    let host = Arc::default();
    drop(hold(&host, &["data", "root"], LATE).unwrap());
    assert_eq!(host.asked(), thawed);
}

#[test]
fn what_cannot_be_held_is_named_and_not_thawed() {
    let host = Arc::default();
    let still = hold(&host, &["fat", "read_only", "theirs", "broken", "root"], LATE).unwrap();
    assert_eq!(names(still.held()), ["root"]);
    let left = still.left();
    assert_eq!(names(left.iter().map(|(left, _)| left)), ["fat", "read_only", "theirs", "broken"]);
    assert!(matches!(
        [&left[0].1, &left[1].1, &left[2].1, &left[3].1],
        [Refusal::Unsupported, Refusal::ReadOnly, Refusal::Frozen, Refusal::Other(_)]
    ));
    still.release().unwrap();
    assert_eq!(host.asked(), ["freeze fat", "freeze theirs", "freeze broken", "freeze root", "thaw root"]);
}

#[test]
fn without_the_right_nothing_stays_frozen_and_nothing_more_is_asked() {
    let host = Arc::default();
    let refused = hold(&host, &["data", "denied", "root"], LATE).unwrap_err();
    assert!(matches!(&refused, HoldError::Denied(which) if which.point.to_str() == Some("denied")));
    assert_eq!(host.asked(), ["freeze data", "freeze denied", "thaw data"]);
}

/// A file system on a loop device whose file's file system was frozen first: it could wait for ever.
#[test]
fn a_file_system_that_needs_a_frozen_one_ends_the_hold_and_is_thawed_too() {
    let host = Arc::default();
    let refused = hold(&host, &["root", "on_root", "data"], SOON).unwrap_err();
    assert!(
        matches!(&refused, HoldError::Stuck { filesystem, .. } if filesystem.point.to_str() == Some("on_root")),
        "{refused:?}"
    );
    host.wait_for("thaw on_root");
    assert_eq!(host.asked(), ["freeze root", "thaw root", "freeze on_root", "thaw on_root"]);
}

#[test]
fn one_that_is_not_thawed_is_named_and_keeps_no_other_frozen() {
    let host = Arc::default();
    let still = hold(&host, &["data", "stubborn", "root"], LATE).unwrap();
    let error = still.release().unwrap_err();
    assert_eq!(error.to_string(), r#"1 file systems were not thawed, "stubborn" (ext4 on 8:1) the first"#);
    assert_eq!(host.asked()[3..], ["thaw root", "thaw stubborn", "thaw data"]);
}
