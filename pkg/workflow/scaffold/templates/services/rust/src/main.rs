//! service-name answers at /service-name, and asks another service for each request where it is told of one.

mod log;
mod metrics;
mod service;
mod trace;

use std::env;
use std::error::Error;
use std::sync::Arc;

use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use crate::service::Service;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let port = env::var("PORT").unwrap_or_else(|_| "8080".to_string());
    let message = env::var("MESSAGE").unwrap_or_else(|_| "hello".to_string());
    let next_url = env::var("NEXT_URL").unwrap_or_default();
    let service = Service::new(message, &next_url)?;

    let listener = TcpListener::bind(format!("0.0.0.0:{port}")).await?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    log::info(&format!("listening on port {port}"));
    // Requests that are being answered are finished first.
    axum::serve(listener, service::router(Arc::new(service)))
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
