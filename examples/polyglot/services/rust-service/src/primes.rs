//! The sieve of Eratosthenes.

/// What one request may ask for: the sieve takes a byte for each number.
pub const LIMIT: usize = 10_000_000;

/// How many primes are less than `below`.
pub fn count(below: usize) -> usize {
    if below < 3 {
        return 0;
    }
    let mut composite = vec![false; below];
    let mut n = 2;
    while n * n < below {
        if !composite[n] {
            for multiple in (n * n..below).step_by(n) {
                composite[multiple] = true;
            }
        }
        n += 1;
    }
    composite[2..].iter().filter(|composite| !**composite).count()
}

#[cfg(test)]
mod tests {
    use super::count;

    #[test]
    fn known_counts() {
        for (below, primes) in [(0, 0), (2, 0), (3, 1), (4, 2), (5, 2), (10, 4), (26, 9), (100, 25), (1_000_000, 78_498)] {
            assert_eq!(count(below), primes, "below {below}");
        }
    }
}
