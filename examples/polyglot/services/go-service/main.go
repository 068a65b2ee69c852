package main

import (
	"encoding/json"
	"log"
	"net/http"
	"os"
	"time"
)

type HealthResponse struct {
	Status    string    `json:"status"`
	Timestamp time.Time `json:"timestamp"`
}

type GatewayResponse struct {
	Message string `json:"message"`
	Service string `json:"service"`
}

func healthHandler(w http.ResponseWriter, r *http.Request) {
	response := HealthResponse{
		Status:    "healthy",
		Timestamp: time.Now(),
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(response)
}

func gatewayHandler(w http.ResponseWriter, r *http.Request) {
	response := GatewayResponse{
		Message: "Request processed by Go Gateway",
		Service: "go-service",
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(response)
}

func main() {
	port := os.Getenv("PORT")
	if port == "" {
		port = "8080"
	}

	http.HandleFunc("/health", healthHandler)
	http.HandleFunc("/ready", healthHandler)
	http.HandleFunc("/api/v1/gateway", gatewayHandler)

	log.Printf("Go service starting on port %s", port)
	log.Fatal(http.ListenAndServe(":"+port, nil))
}
