package dev.polymesh.shop;

import java.util.Map;
import org.springframework.boot.SpringApplication;
import org.springframework.boot.autoconfigure.SpringBootApplication;
import org.springframework.http.HttpStatus;
import org.springframework.web.bind.annotation.RequestMapping;
import org.springframework.web.bind.annotation.ResponseStatus;
import org.springframework.web.bind.annotation.RestController;

/** The way into the old system: its routes are in application.yml. */
@SpringBootApplication
@RestController
public class Gateway {
    public static void main(String[] args) {
        SpringApplication.run(Gateway.class, args);
    }

    /** What a caller gets while the circuit to a service is open. */
    @RequestMapping("/unavailable")
    @ResponseStatus(HttpStatus.SERVICE_UNAVAILABLE)
    Map<String, String> unavailable() {
        return Map.of("error", "the service does not answer; try again in a moment");
    }
}
