//! Huge pages for a test: set aside when it begins, given back when it ends.

use std::fs::{File, OpenOptions, read_to_string, write};
use std::path::{Path, PathBuf};

/// Huge pages that this process has had the host set aside. Dropping it gives them back; those in use by then
/// go as soon as they are free.
///
/// A test program that is killed gives nothing back.
#[derive(Debug)]
pub(crate) struct Pages {
    folder: PathBuf,
    count: u64,
}

impl Pages {
    /// Sees to `count` free huge pages of a size, whose folder this is: has as many more set aside, if this
    /// user may, so that tests that run at once do not take each other's. Else what is free has to do, and
    /// there is nothing to give back.
    ///
    /// # Errors
    ///
    /// The reason why there are not so many, as one line for people.
    pub(crate) fn set_aside(folder: &Path, count: u64) -> Result<Option<Self>, String> {
        let setting = folder.join("nr_hugepages");
        let Ok(lock) = locked(&setting) else {
            return enough_free(folder, count).map(|()| None);
        };
        let before = number(&setting)?;
        let wanted = before + count;
        let set = |pages: u64| {
            write(&setting, pages.to_string())
                .map_err(|error| format!("{} cannot be set: {error}", setting.display()))
        };
        set(wanted)?;
        let came = number(&setting)?;
        if came < wanted {
            set(before)?;
            let more = came.saturating_sub(before);
            return Err(format!("of {count} huge pages, the host could set aside {more}"));
        }
        drop(lock);
        Ok(Some(Self { folder: folder.to_owned(), count }))
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        let setting = self.folder.join("nr_hugepages");
        // Whoever could set them aside can give them back; and there is nobody to tell.
        if let (Ok(_lock), Ok(now)) = (locked(&setting), number(&setting)) {
            let _ = write(&setting, now.saturating_sub(self.count).to_string());
        }
    }
}

/// The setting, for writing, while no other test program changes it. The lock ends with what is returned.
fn locked(setting: &Path) -> std::io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).open(setting)?;
    file.lock()?;
    Ok(file)
}

fn enough_free(folder: &Path, count: u64) -> Result<(), String> {
    let free = number(&folder.join("free_hugepages"))?;
    if free < count {
        return Err(format!(
            "{free} free huge pages of {count}, and no right to set more aside: set {}",
            folder.join("nr_hugepages").display()
        ));
    }
    Ok(())
}

fn number(path: &Path) -> Result<u64, String> {
    let text = read_to_string(path).map_err(|error| format!("{} cannot be read: {error}", path.display()))?;
    text.trim().parse().map_err(|_| format!("{} is not a number: {text:?}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::fs::{create_dir_all, remove_dir_all};

    use super::*;

    /// A made-up folder of huge pages, removed when dropped.
    struct Pool(PathBuf);

    impl Pool {
        fn with(test: &str, files: &[(&str, &str)]) -> Self {
            let name = format!("tideover-harness-{}-pool-{test}", std::process::id());
            let pool = Self(std::env::temp_dir().join(name));
            create_dir_all(&pool.0).unwrap();
            files.iter().for_each(|(file, text)| write(pool.0.join(file), text).unwrap());
            pool
        }

        fn reserved(&self) -> String {
            read_to_string(self.0.join("nr_hugepages")).unwrap()
        }
    }

    impl Drop for Pool {
        fn drop(&mut self) {
            let _ = remove_dir_all(&self.0);
        }
    }

    #[test]
    fn what_is_set_aside_comes_on_top_and_is_given_back() {
        let pool = Pool::with("sum", &[("nr_hugepages", "5\n"), ("free_hugepages", "5\n")]);
        let one = Pages::set_aside(&pool.0, 16).unwrap();
        assert_eq!(pool.reserved(), "21");
        let other = Pages::set_aside(&pool.0, 1).unwrap();
        assert_eq!(pool.reserved(), "22");
        drop(one);
        assert_eq!(pool.reserved(), "6");
        drop(other);
        assert_eq!(pool.reserved(), "5");
    }

    #[test]
    fn without_the_right_to_set_pages_aside_those_that_are_free_have_to_do() {
        let pool = Pool::with("free", &[("free_hugepages", "3\n")]);
        assert!(Pages::set_aside(&pool.0, 3).unwrap().is_none());
        let reason = Pages::set_aside(&pool.0, 4).unwrap_err();
        assert!(reason.contains("3 free huge pages of 4"), "{reason}");
        assert!(reason.contains("nr_hugepages"), "{reason}");
    }

    #[test]
    fn a_pool_that_says_nonsense_is_an_error() {
        let pool = Pool::with("odd", &[("nr_hugepages", "many\n")]);
        assert!(Pages::set_aside(&pool.0, 1).unwrap_err().contains("not a number"));
        assert_eq!(pool.reserved(), "many\n");
        assert!(Pages::set_aside(Path::new("/sys/no such size"), 1).unwrap_err().contains("cannot be read"));
    }
}
