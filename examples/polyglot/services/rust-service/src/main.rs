//! The CPU-heavy part of the app: it counts primes. It is the end of the chain and calls nobody.

mod log;
mod metrics;
mod primes;
mod service;
mod tracing;

use std::env;
use std::error::Error;
use std::sync::Arc;

use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

fn main() -> Result<(), Box<dyn Error>> {
    let spans = tracing::provider()?;
    // The counting has threads of its own (spawn_blocking), so one thread is enough for answering.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    runtime.block_on(serve(tracing::Tracing::new(spans.as_ref())))?;
    if let Some(Err(error)) = spans.map(|spans| spans.shutdown()) {
        log::info(&format!("the last spans were not sent: {error}"));
    }
    Ok(())
}

async fn serve(tracing: tracing::Tracing) -> Result<(), Box<dyn Error>> {
    let port = env::var("PORT").unwrap_or_else(|_| "8080".to_string());
    let listener = TcpListener::bind(format!("0.0.0.0:{port}")).await?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    log::info(&format!("listening on port {port}"));
    // Requests that are being answered are finished first.
    axum::serve(listener, service::router(Arc::new(service::Observer { metrics: metrics::Metrics::new()?, tracing })))
        .with_graceful_shutdown(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            log::info("shutting down");
        })
        .await?;
    log::info("stopped");
    Ok(())
}
